"""`python -m sbora_diffusion` is `sbora`."""

from sbora_diffusion.cli import main

if __name__ == "__main__":
    main()
