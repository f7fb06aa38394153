"""Cost of a training batch with callbacks that take more passes, freeze, or multiply rates by layer

Beside the same fit without, with FastLoop and without. In time of the processor, which other programs
lengthen less."""
import contextlib, io, warnings
from functools import partial
from time import process_time
warnings.filterwarnings('ignore')

import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper
from fastai_callbacks_ext.all import (AWP, FGM, SAM, BnFreeze, Distill, FastLoop, Freeze, HyperMult, RDrop,
                                      ScheduleFree, layer_groups)
from fastai_callbacks_ext.test_utils import FreeSGD
from harness import measure, options, report
from loop import LR, NETS, Loader, net

class Clock(Callback):
    "Notes the processor's time when each epoch starts"
    order = -100
    def before_fit(self): self.at = []
    def before_epoch(self): self.at.append(process_time())
    def after_fit(self): self.before_epoch()

def seconds(net, make, more, epochs=2, **kwargs):
    "Seconds a batch in the last epoch, with its validation, of which there is no data"
    loader,model,clock = Loader(net.data, net.sampler),net.model(),Clock()
    cbs = [*make(net), *net.needs(), *more(), clock]
    learn = Learner(DataLoaders(loader, []), model, CrossEntropyLossFlat(), cbs=cbs, **kwargs)
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): learn.fit(epochs, LR)
    return (clock.at[-1]-clock.at[-2])/len(loader)

groups = layer_groups(decay=.75)
sgd = dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)))
free = dict(opt_func=partial(OptimWrapper, opt=FreeSGD))
def none(net): return []
def only(f): return lambda net: [f()]

PASSES = {      # callbacks, of the net; arguments of the learner
    'plain fit': (none, {}),
    'Distill(teacher of the same size)': (lambda net: [Distill(net.model())], {}),
    'RDrop()': (only(RDrop), {}),
    'SAM()': (only(SAM), {}),
    'AWP()': (only(AWP), {})}
EMBEDDED = {'FGM(1)': (only(lambda: FGM(1.)), {})}
LAYERS = {
    'plain fit, a group for each layer': (none, dict(splitter=groups)),
    'HyperMult(groups)': (only(lambda: HyperMult(groups)), dict(splitter=groups)),
    'Freeze({0: 0}), which freezes nothing': (only(lambda: Freeze({0: 0})), dict(splitter=groups)),
    'Freeze({0: -1}), all but the last layer': (only(lambda: Freeze({0: -1})), dict(splitter=groups))}
NORMS = {'BnFreeze()': (only(BnFreeze), {})}
FREE = {
    "PyTorch's SGD": (none, sgd),
    'FreeSGD, ScheduleFree(refresh=False)': (only(lambda: ScheduleFree(refresh=False)), free),
    'FreeSGD, ScheduleFree()': (only(ScheduleFree), free)}

MLP,CNN,LM = NETS
TABLES = {('more passes', CNN): PASSES, ('more passes', LM): PASSES|EMBEDDED, ('by layer', MLP): LAYERS,
          ('by layer', CNN): LAYERS|NORMS, ('schedule-free', CNN): FREE}

def tables(kind, more, rounds):
    for (what,title),cases in TABLES.items():
        run = {k: partial(seconds, net(title, 'cpu'), make, more, **kwargs)
               for k,(make,kwargs) in cases.items()}
        yield f'{kind}, {what}. {title}',measure(run, rounds, 'µs a batch')

def main():
    args = options(__doc__, rounds=5).parse_args()
    kinds = {'fastai': list, 'FastLoop': lambda: [FastLoop()]}
    found = {k: t for kind,more in kinds.items() for k,t in tables(kind, more, args.rounds)}
    report('passes', found, args.rounds)

if __name__=='__main__': main()
