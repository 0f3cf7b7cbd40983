"""A site that trains the transformer on its share of scanned digits."""

import argparse

from transformers import Trainer, TrainingArguments
from vit import load_data, make_model

import flarebus.client.hf as flare


def measure(predicted):
    return {"accuracy": (predicted.predictions.argmax(axis=-1) == predicted.label_ids).mean()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    parser.add_argument("--epochs", type=float, default=3, help="in each round")
    args = parser.parse_args()

    flare.init()
    site = flare.get_site_name()
    train_set, test_set = load_data(int(site.rpartition("-")[2]) - 1, args.n_sites)
    trainer = Trainer(
        make_model(),
        TrainingArguments(
            output_dir="checkpoints",  # in the folder of this site
            use_cpu=True,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=256,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=measure,
    )
    flare.patch(trainer)

    while flare.is_running():
        received = flare.receive()
        # The received model: its accuracy goes to the server with the result, and chooses the best model.
        found = trainer.evaluate()
        print(f"{site}, round {received.current_round}: received accuracy {found['eval_accuracy']:.3f}")
        trainer.train()


if __name__ == "__main__":
    main()
