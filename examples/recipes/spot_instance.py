"""A run that was killed goes on where it was, in mid-epoch too, when started again

    python examples/recipes/spot_instance.py --path runs/spot_instance --epochs 100

Kill it (`kill -9`, Ctrl-C) and start the same line again. A run that has finished says
so and does not train again."""
from fastai.vision.all import *
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import digits_dls, digits_model

@call_parse
def main(
    path:Path='runs/spot_instance', # Folder, on a disk that outlives the machine
    epochs:int=5, # How often to go through the data
):
    set_seed(42)
    dls,model = digits_dls(),digits_model()     # your data, your model
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, path=path)
    learn.fit_one_cycle(epochs, 1e-2, cbs=[
        Checkpoint(path/'checkpoints', steps=10),   # for a long run: minutes=10
        PreemptionGuard()])     # saves once more when a signal announces the end
    learn.export('model.pkl')
