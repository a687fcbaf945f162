#!/usr/bin/env bash
# The commands behind benchmarks/results/: one line a run, one thread each.
# All of them in turn: bash benchmarks/first_curves.sh. Two at a time: grep '^python' \
# benchmarks/first_curves.sh | xargs -P 2 -I{} sh -c '{}', after the two lines below.
# Interrupted? The same again, with --resume added to every line. Then: python benchmarks/report.py
set -e
export OMP_NUM_THREADS=1 ROOT="--run-root runs/first_curves"
export SHORT="--env-id dmc/walker-run --total-timesteps 20000 --updates-per-step 10 --learning-starts 5000 --eval-frequency 2500"
python sac.py --env-id dmc/walker-run --total-timesteps 50000 --seed 1 $ROOT
python sac.py --env-id dmc/walker-run --total-timesteps 50000 --seed 2 $ROOT
python sac.py $SHORT --exp-name sac_utd10 --seed 1 $ROOT
python sac.py $SHORT --exp-name sac_utd10 --seed 2 $ROOT
python mbpo.py $SHORT --model-max-updates 500 --seed 1 $ROOT
python mbpo.py $SHORT --model-max-updates 500 --seed 2 $ROOT
python mbpo_ftfl.py $SHORT --model-max-updates 500 --seed 1 $ROOT
python mbpo_ftfl.py $SHORT --model-max-updates 500 --seed 2 $ROOT
python mbpo_residual_ablation.py $SHORT --model-max-updates 500 --seed 1 $ROOT
python mbpo_residual_ablation.py $SHORT --model-max-updates 500 --seed 2 $ROOT
python mbpo.py --env-id Hopper-v5 --total-timesteps 20000 --learning-starts 5000 --target-entropy -1 --rollout-schedule 25000 155000 1 15 --model-max-updates 1000 --eval-frequency 2500 --seed 1 $ROOT
