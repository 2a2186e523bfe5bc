"""``python -m megatron_qad.cli``: the command ``megatron-qad`` for launchers."""

from megatron_qad.cli.main import main

if __name__ == "__main__":
    main()
