#!/bin/bash
# Exports a model as a Slurm job array: a task per method and architecture compiles, and one job more joins them.
#
#   bash slurm.sh --target hf --checkpoint Qwen3-8B --arch sm_80,sm_90 --output-dir out
#
# Run it in a folder that the nodes share; they need the same versions of all packages and of g++, and no GPU. Memory: a
# task holds no weights, and the job that joins maps them from files.
set -euo pipefail

export-model "$@" --plan plan.json > plan.commands # one command a line, the one that joins comes last
tasks=$(($(wc -l < plan.commands) - 1))

array=$(sbatch --parsable --job-name=compile --cpus-per-task=4 --mem=16G --array="1-$tasks" \
  --wrap 'eval "$(sed -n "${SLURM_ARRAY_TASK_ID}p" plan.commands)"')
sbatch --job-name=join --cpus-per-task=4 --mem=32G --dependency="afterok:${array%%;*}" \
  --wrap 'eval "$(tail -n 1 plan.commands)"'
