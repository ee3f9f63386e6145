# An engineer with a script and a DeepSpeed JSON: train, look at the checkpoint, use the weights anywhere.
set -e
accelerate launch --num_processes 2 --use_deepspeed --deepspeed_config_file ds.json train.py
robust-dist inspect checkpoint
robust-dist export checkpoint exported
python - <<'PYTHON'
import torch
from safetensors.torch import load_model
from train import net

model = net()
load_model(model, "exported/model.safetensors")
torch.testing.assert_close(model(torch.ones(1, 3, 16, 16)), torch.load("logits.pt"))
print("the exported model gives the trained one's logits")
PYTHON
