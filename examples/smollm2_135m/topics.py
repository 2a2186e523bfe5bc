"""Free English text for training beside the model's own: Python's language reference, out of its standard library.

``python topics.py FILE`` writes one JSONL line ``{"text": ...}`` a topic, about 119,000 tokens in all.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    output = Path(sys.argv[1])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)), encoding="utf-8")


if __name__ == "__main__":
    main()
