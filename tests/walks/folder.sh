# A student with a folder of pictures, a sub-folder for each class: look, train, evaluate, predict, take the model along.
set -e
robust-dist recipe pictures --out pictures.yaml
robust-dist train --config pictures.yaml --model.name resnet8 --data.size 16 --epochs 8 --run_dir runs/pictures
robust-dist evaluate runs/pictures
robust-dist predict runs/pictures pictures --format csv --out predictions.csv
robust-dist export runs/pictures exported
python - <<'PYTHON'
from pathlib import Path

import robust_dist

model, preprocess = robust_dist.load("exported")
picture = next(Path("pictures").rglob("*.png"))
print(picture, "is", preprocess.classes[model(preprocess(picture)[None]).argmax()])
PYTHON
