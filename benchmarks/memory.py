"""Time of an item in pieces of `MicroBatch`, over small batches that are accumulated, with the same gradient

Then the time of a batch that fits, with `MicroBatch` over without. On a GPU there would be more to measure:
the time until a real error of memory is undone, the memory of pieces over that of small batches, and how
close `find_batch_size` comes to the memory that a fit then takes.
"""
import warnings
from functools import partial
from time import perf_counter
warnings.filterwarnings('ignore')

from fastai.callback.core import Callback
from torch import nn
from fastai_callbacks_ext.all import GradientAccumulation, SkipNonFinite
from fastai_callbacks_ext.memory import MicroBatch
from fastai_callbacks_ext.test_utils import digits_learner, digits_model
import harness

def net(width=32):
    "A network of 120,000 parameters, whose step takes some milliseconds"
    def block(i, o): return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    blocks = *block(1, width),*block(width, 2*width),*block(2*width, 3*width)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12*width, 10))

class Timed(Callback):
    "Seconds of the batches, without those of loading"
    order,run_valid = -1000,False
    def before_train(self): self.start = perf_counter()
    def after_train(self): self.seconds = perf_counter()-self.start

def case(model, bs, *cbs, n_batches):
    "Seconds an item (of training), for a learner that is made once"
    learn = digits_learner([t := Timed(), *(cb() for cb in cbs)], bs=bs, n=1250, model=model())
    b = learn.dls.one_batch()
    learn.dls.loaders = [[b]*n_batches, []]
    def seconds():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return t.seconds/(n_batches*len(b[0]))
    return seconds

def main():
    parser = harness.options(__doc__, rounds=15)
    args = parser.parse_args()
    tables = {}
    for title,model,size,k,n in (('A convolutional network, 64 items in pieces of 16', net, 64, 16, 4),
                                 ('A tiny network, 64 items in pieces of 16', digits_model, 64, 16, 16)):
        accumulate = case(model, k, partial(GradientAccumulation, size), n_batches=n*size//k)
        cases = {'GradientAccumulation, batches of 16': accumulate,
                 'MicroBatch(16)': case(model, size, partial(MicroBatch, k), n_batches=n),
                 'MicroBatch(), 16 found': case(model, size, partial(_found, k), n_batches=n),
                 'whole batches of 64': case(model, size, n_batches=n)}
        tables[title] = harness.measure(cases, args.rounds, unit='µs an item')
    for title,model,n in (('The convolutional network, all batches fit', net, 4),
                          ('The tiny network, all batches fit', digits_model, 16)):
        cases = {'without': case(model, 64, n_batches=n),
                 'MicroBatch()': case(model, 64, MicroBatch, n_batches=n),
                 'MicroBatch(64)': case(model, 64, partial(MicroBatch, 64), n_batches=n),
                 'SkipNonFinite()': case(model, 64, SkipNonFinite, n_batches=n)}
        tables[title] = harness.measure(cases, args.rounds, unit='µs an item')
    harness.report('memory', tables, args.rounds)

def _found(k):
    cb = MicroBatch()
    cb.found = dict(train=k, valid=k)
    return cb

if __name__=='__main__': main()
