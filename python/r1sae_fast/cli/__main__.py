"""``python -m r1sae_fast.cli``: for launchers that start modules."""

from r1sae_fast.cli.main import main

if __name__ == "__main__":
    main()
