"""The applications that are compared: each sends the files of the directory that BENCH_FILES names, below /files/."""
