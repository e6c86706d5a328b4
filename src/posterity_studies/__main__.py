"""``posterity``, or ``python -m posterity_studies``: the command line."""

import sys


def main() -> None:
    """Run the command line; interrupted while it still imports, it ends in a line, too."""
    try:
        from posterity_studies import cli
    except KeyboardInterrupt:
        print("\nposterity: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
