"""Names of files that proxies and stores have to keep apart."""

ODD_NAMES = [
    "plain.txt",
    "a b.txt",
    "50%.txt",
    "50%25.txt",
    "a%20b.txt",
    "q?.txt",
    "h#.txt",
    "plus+.txt",
    "é.txt",
    "π.txt",
    ",.txt",
    "@at.txt",
]
