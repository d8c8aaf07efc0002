import torch, glob, os
torch.ops.load_library(glob.glob(os.path.join(os.path.dirname(__file__), "_cpu*.so"))[0])
