"""A training process of a study: `launch/train.py`'s entry, which does not outlive its worker.

python -m robust_dist.study.child WORKER_PID --config RECIPE.yaml --run_dir DIR --seed N
"""

import os
import signal
import sys
import threading
import time

# After this, a training process that does not end by itself is ended.
GRACE_SECONDS = 30.0


def _follow(worker: int) -> None:
    """End this process when its worker has; a signal first, for the sake of what it may want to save."""
    while os.getppid() == worker:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_follow, args=(int(sys.argv[1]),), daemon=True).start()
    from robust_dist.train.main import main

    main(sys.argv[2:])
