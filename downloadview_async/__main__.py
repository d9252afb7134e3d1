"""`python -m downloadview_async`: the command `downloadview`."""

from downloadview_async.cli import main

if __name__ == "__main__":
    main()
