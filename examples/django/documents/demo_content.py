"""The content of the demo: its users, their password and their files."""

PASSWORD = "demo"
MIB = 1024 * 1024
FILES = {
    "ada": [
        ("Notes on the analytical engine.txt", b"The engine weaves algebraical patterns.\n" * 400),
        ("Umsätze 2026, 1. Quartal.csv", "Monat;Umsatz\nJanuar;1200\nFebruar;1350\nMärz;990\n".encode()),
        ("recording.bin", bytes(range(256)) * (24 * MIB // 256)),
    ],
    "grace": [("Nanoseconds.txt", b"A nanosecond is 30 cm of wire.\n")],
}
