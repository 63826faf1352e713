"""`python -m inflash`: the same as the `inflash` command."""

from inflash._cli import main

if __name__ == "__main__":
    main()
