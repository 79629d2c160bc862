"""`python -m act_peft` is `act-peft`."""

from act_peft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
