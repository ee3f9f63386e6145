"""Train any recipe: `accelerate launch --config_file configs/accelerate/E.yaml launch/train.py --config R.yaml`."""

if __name__ == "__main__":
    # Here and not above: the server that forks the image readers imports this file, but needs nothing from it.
    from robust_dist.train.main import main

    main()
