"""`python -m anysize`, which is also how torchrun and accelerate launch start it."""

from anysize.cli.main import main

if __name__ == "__main__":
    main()
