"""Print the tables of docs/atat.md and docs/blocks.md:  python -m atat_fast.audit"""

from atat_fast.audit.blocks import block_table
from atat_fast.audit.masks import blind_table, table
from atat_fast.audit.schedules import counts_table, identity_table

if __name__ == "__main__":
    print(table(), blind_table(), counts_table(), identity_table(), block_table(), sep="\n\n")
