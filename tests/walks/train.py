"""An engineer's own script: accelerate launch --use_deepspeed --deepspeed_config_file ds.json train.py."""

import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim, DummyScheduler
from torch.nn.functional import cross_entropy

import robust_dist.autoregister  # noqa: F401
from robust_dist import RobustAugment, sample_keys

EPOCHS = 2


def net():
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(392, 4)]
    return torch.nn.Sequential(*layers)


def main():
    torch.manual_seed(0)
    accelerator = Accelerator()
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    samples = torch.utils.data.TensorDataset(images, images[:, 0].float().mean((1, 2)).long() % 4, torch.arange(64))
    loader = torch.utils.data.DataLoader(samples, batch_size=16, shuffle=True)
    model = net()
    optimizer = DummyOptim(model.parameters(), lr=0.01, weight_decay=0.01)
    scheduler = DummyScheduler(optimizer, total_num_steps=EPOCHS * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    augment = RobustAugment(num_classes=4, size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    for epoch in range(EPOCHS):
        for batch, labels, indices in loader:
            pixels, targets = augment(batch, labels, sample_keys(0, epoch, indices))
            accelerator.backward(cross_entropy(model(pixels), targets))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.save_state("checkpoint")
    with torch.no_grad():
        logits = model(torch.ones(1, 3, 16, 16))
    if accelerator.is_main_process:
        torch.save(logits, "logits.pt")


if __name__ == "__main__":
    main()
