"""``python -m posterity_studies``: the command line."""

from posterity_studies.cli import main

if __name__ == "__main__":
    main()
