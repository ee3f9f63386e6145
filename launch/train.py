"""Train any recipe: `accelerate launch --config_file configs/accelerate/E.yaml launch/train.py --config R.yaml`."""

from robust_dist.train.main import main

if __name__ == "__main__":
    main()
