"""``python -P -m phalanx.cli`` is ``phalanx``."""

from phalanx.cli.entry import main

if __name__ == "__main__":
    main()
