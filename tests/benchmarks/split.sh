#!/usr/bin/env bash
# Splits data/full/ for protocol.yaml: rows to tune on, data_tuning/, and others, data_final/.
set -euo pipefail
mkdir -p data_tuning/full data_final/full
for file in data/full/T*_full.jsonl; do
    awk 'NR % 3 == 0' "$file" > "data_tuning/full/${file##*/}"
    awk 'NR % 3 != 0' "$file" > "data_final/full/${file##*/}"
done
# A published test file is for the final tables: to tune, training rows take its place.
mkdir -p data_tuning/full/long_sequence data_final/full/long_sequence
for test in data/full/long_sequence/*_test.jsonl; do
    train=${test/_test.jsonl/.jsonl}
    awk 'NR % 4 == 0' "$train" > "data_tuning/full/long_sequence/${test##*/}"
    awk 'NR % 4 == 1' "$train" > "data_tuning/full/long_sequence/${train##*/}"
    awk 'NR % 4 > 1' "$train" > "data_final/full/long_sequence/${train##*/}"
    cp "$test" data_final/full/long_sequence/
done
