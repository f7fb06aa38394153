"""Fine-tune by layers: find a rate, unfreeze step by step, mix images, average

    python examples/recipes/by_layers.py --path runs/by_layers

The last line is the accuracy of the averaged weights, which the export has."""
from fastai.vision.all import *
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import digits_dls, digits_model

@call_parse
def main(
    path:Path='runs/by_layers', # Folder for the exported model
    epochs:int=8, # How often to go through the data
    bs:int=64, # Items in a batch
):
    set_seed(42)
    groups = layer_groups(decay=.75)        # smaller rates for earlier layers
    dls,model = digits_dls(bs),digits_model()       # yours: a pretrained model
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy,
                    splitter=groups, path=path)

    lr = lr_find(learn, suggest='minimum', show_plot=False).minimum
    cbs = [
        HyperMult(groups),              # those rates; norms and biases do not decay
        Freeze({0: -1, 1: 0}),          # the head alone in the first epoch
        Schedule.wsd(.1, .3),           # warm-up, stable, decay
        CutMixUp(until=.8),             # mixed images, but not in the last fifth
        MicroBatch(),                   # a batch that does not fit is done in pieces
        EMA()]                          # validated and kept: the average
    learn.fit(epochs, lr, cbs=cbs)

    path.mkdir(parents=True, exist_ok=True)
    learn.export('model.pkl')
    print(f'accuracy {learn.validate()[1]:.3f} at a rate of {lr:.2g}')
