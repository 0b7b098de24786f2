"""`python -m switchlm`."""

from switchlm.cli.main import main

if __name__ == "__main__":
    main()
