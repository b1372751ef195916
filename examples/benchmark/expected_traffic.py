# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmark's models will move, computed before there is a GPU: a bus that is slower than this is the limit.

    python examples/benchmark/expected_traffic.py --bus_gb_per_s 50

Ids are taken to follow a Zipf law; misses are those of the planner, for scratchpads that are full. As many rows leave
as come.
"""

import argparse

from workloads import WORKLOADS

from torchrec_scratchpipe.planning.reuse import misses_of_pool
from torchrec_scratchpipe.planning.zipf import zipf_reuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zipf", default="0,0.8,1.05,1.2", help="exponents, comma-separated")
    parser.add_argument("--load_factor", default="0.01,0.02,0.05,0.1")
    parser.add_argument("--lookahead", type=int, default=2)
    parser.add_argument("--bus_gb_per_s", type=float, default=50.0, help="each way, both at once")
    args = parser.parse_args()
    print("| model | Zipf | unique rows | load factor | misses a batch | MB each way, SGD | ms | MB, Adam | ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for workload in WORKLOADS.values():
        ids_per_table = workload.batch_size * workload.ids_per_bag
        for exponent in map(float, args.zipf.split(",")):
            reuse = zipf_reuse(workload.num_embeddings, ids_per_table, exponent, args.lookahead, 0)
            unique = workload.num_tables * reuse.window(1).mean
            for load_factor in map(float, args.load_factor.split(",")):
                num_slots = load_factor * workload.num_embeddings
                misses = workload.num_tables * float(misses_of_pool([reuse], num_slots)[0].sum())
                fits = reuse.window(args.lookahead + 1).mean <= num_slots
                cells = [workload.name, f"{exponent:g}", f"{unique:,.0f}", f"{load_factor:.0%}"]
                cells.append(f"{misses:,.0f}" if fits else f"{misses:,.0f} (lookahead {args.lookahead} does not fit)")
                for values_per_weight in (1, 3):
                    megabytes = misses * workload.embedding_dim * 4 * values_per_weight / 1e6
                    cells += [f"{megabytes:.1f}", f"{megabytes / args.bus_gb_per_s:.2f}"]
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
