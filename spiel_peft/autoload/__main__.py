"""`python -m spiel_peft.autoload`."""

import sys

from spiel_peft.autoload import main

if __name__ == "__main__":
    sys.exit(main())
