"""Who else can send a file: its location in, the header that a reverse proxy obeys out."""
