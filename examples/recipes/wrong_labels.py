"""Check a learner, train it with all monitors, and list items with a wrong label

    python examples/recipes/wrong_labels.py --path runs/wrong_labels

Afterwards, the folder has a report of the run, to be opened in a browser."""
from fastai.vision.all import *
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import digits_model
from sklearn.datasets import load_digits

@call_parse
def main(
    path:Path='runs/wrong_labels', # Folder for the log, the report and the table
    epochs:int=5, # How often to go through the data
    wrong:int=60, # Items that get a wrong label here, to see that they are found
):
    set_seed(42)
    x,y = map(torch.tensor, load_digits(return_X_y=True))       # your data
    right = y.clone()
    y[:wrong] = (y[:wrong]+1) % 10
    items = list(zip((x/16).float().view(-1,1,8,8), y))
    dls = DataLoaders.from_dsets(items[:1500], items[1500:], bs=64, num_workers=0)
    loss_func = CrossEntropyLossFlat()
    learn = Learner(dls, digits_model(), loss_func, metrics=accuracy, path=path)

    print(preflight(learn, n_epoch=epochs))     # is all right? how long will it take?
    cbs = monitors(path)
    learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)

    stats = next(cb for cb in cbs if isinstance(cb, ItemStats))
    suspects = stats.suspects(wrong)            # look at these first
    suspects.to_csv(path/'suspects.csv')
    found = (y!=right)[suspects.index.tolist()].sum()
    print(f'{found} of {wrong} wrong labels are among the first {wrong} suspects')
