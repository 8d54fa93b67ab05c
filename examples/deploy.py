"""Runs a model of ours where there is no torch: python examples/deploy.py runs/x/model.onnx"""

import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
first = session.get_inputs()[0]
images = np.zeros((2, *first.shape[1:]), np.float32)  # two of your inputs, normalized as in training
print(session.run(None, {first.name: images})[0].argmax(1))
