"""The model: a small convolutional network for images of 8 by 8 pixels."""

import keras
from keras import layers


def make_net(channels=16, lr=0.1):
    """Two convolutions and a linear layer; `(n, 8, 8, 1)` float32 in, `(n, 10)` logits out; ready to be trained."""
    # Layers have names of their own: those that Keras gives count on with every model that is made.
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(channels, kernel_size=3, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(2 * channels, kernel_size=3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(10, name="linear"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(lr, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model
