#!/usr/bin/env bash
# From a clone to a trained classifier: creates .venv, installs, trains the full recipe on handwritten digits on all
# GPUs
# (or else on two CPU ranks), and shows the result. Run again, it resumes where it stopped, or shows the result.
# Arguments override the recipe: bash launch/quickstart.sh --epochs 4 --run_dir runs/short
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh train
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ]; then
  ranks=$((gpus < 8 ? gpus : 8))
  launch=(--config_file configs/accelerate/ddp.yaml --num_processes "$ranks")
  extra=(--model.sync_batchnorm true)
else
  ranks=2
  launch=(--config_file configs/accelerate/cpu.yaml)
  extra=()
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
fi
echo "training configs/recipes/quickstart.yaml on $ranks $([ "$gpus" -gt 0 ] && echo GPU || echo CPU) rank(s)"
exec "$python" -m accelerate.commands.launch "${launch[@]}" launch/train.py \
  --config configs/recipes/quickstart.yaml --num_processes "$ranks" ${extra[@]+"${extra[@]}"} "$@"
