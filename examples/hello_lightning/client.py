"""A site that trains the network on its share of scanned digits."""

import argparse

import lightning.pytorch as pl
from module import DigitsData, DigitsModule

import flarebus.client.lightning as flare


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=2, help="in each round")
    args = parser.parse_args()

    flare.init()
    site = flare.get_site_name()
    module = DigitsModule()
    data = DigitsData(int(site.rpartition("-")[2]) - 1, args.n_sites)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    flare.patch(trainer)

    while flare.is_running():
        received = flare.receive()
        # The received model: its accuracy goes to the server with the result, and chooses the best model.
        found = trainer.validate(module, data, verbose=False)
        print(f"{site}, round {received.current_round}: received accuracy {found[0]['accuracy']:.3f}")
        trainer.fit(module, data)


if __name__ == "__main__":
    main()
