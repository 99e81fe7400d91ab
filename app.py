"""The Gradio app: `python app.py` does the same as `sbora app`."""

import sys

from sbora_diffusion.app.server import main
from sbora_diffusion.core.errors import SboraError

if __name__ == "__main__":
    try:
        main()
    except SboraError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
