"""`python -m lory_router` is `lory`."""

from lory_router.cli import main

if __name__ == "__main__":
    main()
