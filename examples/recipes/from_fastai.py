"""Move a script with fastai's callbacks to these: one more import, and `upgrade`

    python examples/recipes/from_fastai.py --path runs/from_fastai"""
from fastai.vision.all import *
from fastai_callbacks_ext.all import *      # new, after fastai: shared names are ours
from fastai_callbacks_ext.test_utils import digits_dls, digits_model

@call_parse
def main(
    path:Path='runs/from_fastai', # Folder for the models
    epochs:int=3, # How often to go through the data
):
    set_seed(42)
    path.mkdir(parents=True, exist_ok=True)
    # fastai's
    cbs = [SaveModelCallback(monitor='accuracy', fname='best'), CSVLogger()]
    learn = Learner(digits_dls(), digits_model(), CrossEntropyLossFlat(),
                    metrics=accuracy, path=path, cbs=cbs)
    upgrade(learn)      # new: swaps those on the learner that we have too, says which
    # In the fit:
    # before                               after
    # TerminateOnNaNCallback()             the same name, or TerminateOnNaN()
    # EarlyStoppingCallback(patience=3)    the same name, or EarlyStopping(patience=3)
    # GradientClip(1.)                     the same name
    # GradientAccumulation(128)            the same name
    # SaveModelCallback('accuracy')        SaveTopK('accuracy', k=1)
    learn.fit_one_cycle(epochs, 1e-2, cbs=[
        TerminateOnNaNCallback(), EarlyStoppingCallback(patience=3), GradientClip(1.)])
