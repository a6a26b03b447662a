"""`python -m attnc`."""

from attnc.runtime.cli import main

if __name__ == "__main__":
    main()
