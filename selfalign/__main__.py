"""`python -m selfalign` is the command `selfalign`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
