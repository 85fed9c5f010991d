"""The linear user model of these tests."""


def net(leaf: str, imports: str = "") -> str:
    """Its code; `leaf` is the body of `loss_and_gradients`, a line each."""
    body = "\n".join(f"        {line}" for line in leaf.strip().splitlines())
    return f"""
import numpy as np
from phalanx.models import UserModel
{imports}

class Net(UserModel):
    def __init__(self, schema):
        super().__init__(schema, {{"w": (schema.features, schema.classes)}})

    def initial(self, seed):
        return {{"w": np.zeros((self.schema.features, self.schema.classes), np.float32)}}

    def loss_and_gradients(self, parameters, features, targets):
{body}

    def predictions(self, parameters, features):
        return features @ parameters["w"]
"""
