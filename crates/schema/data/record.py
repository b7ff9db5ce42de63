"""Writes operators.txt: the signatures that torch gives of its own operators, a line each.

Run in an environment with torch from PyPI (`python -m venv V && V/bin/pip install torch`):

    V/bin/python crates/schema/data/record.py > crates/schema/data/operators.txt

Left out are overloads whose names end in `out`: torch generates them from the others, and they differ from those in one last
argument. `--all` writes them, too.
"""

import sys

import torch

COMMAND = "python crates/schema/data/record.py > crates/schema/data/operators.txt"


def overload(schema: str) -> str:
    return schema.split("(")[0].partition(".")[2]


def main() -> None:
    every = sorted({str(schema) for schema in torch._C._jit_get_all_schemas()})
    kept = every if "--all" in sys.argv else [schema for schema in every if not overload(schema).endswith("out")]
    print(f"# Signatures of torch {torch.__version__}'s operators, by torch._C._jit_get_all_schemas().")
    print(f"# Recorded by: {COMMAND}")
    print(f"# {len(kept)} of {len(every)}; left out are {len(every) - len(kept)} overloads whose names end in `out`.")
    print("# torch is under its BSD-style license, https://github.com/pytorch/pytorch/blob/main/LICENSE.")
    print("\n".join(kept))


main()
