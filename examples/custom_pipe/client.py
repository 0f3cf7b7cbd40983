"""A site that adds one to every weight. What its messages travel through it need not know, but may ask."""

import numpy as np

import flarebus.client as flare


def main():
    flare.init()
    print("talks through", flare.get_config()["TASK_EXCHANGE"]["pipe"]["CLASS_NAME"])
    while flare.is_running():
        received = flare.receive()
        weights = received.params["weights"]
        print(f"{flare.get_site_name()}, round {received.current_round}: mean weight {np.mean(weights):.2f}")
        flare.send(flare.FLModel(params={"weights": weights + 1}))


if __name__ == "__main__":
    main()
