"""Cost of a training batch with each callback of the page on gradients, beside fastai's, timm's or a plain
step; and the memory of each beside the model's"""
import gc, warnings
from functools import partial
warnings.filterwarnings('ignore')

import torch
from fastai.basics import *
from fastai.callback import training
from fastai_callbacks_ext.all import (SAM, GradientAccumulation, GradientCentralization, GradientClip,
                                      GradientNoise, LookaheadWeights)
from fastai_callbacks_ext.test_utils import digits_learner
from harness import measure, options, ratio, report
from loop import NETS, fastai, net, seconds

class AGC(Callback):
    "timm's function"
    order,run_valid = 11,False
    def before_step(self):
        from timm.utils.agc import adaptive_clip_grad
        adaptive_clip_grad(self.model.parameters(), 0.01)

FAST = "fastai's GradientAccumulation(4 batches)"
CASES = {   # title: peer first
    'Accumulation': lambda bs: {
        FAST: lambda: [training.GradientAccumulation(4*bs)],
        'GradientAccumulation(4 batches)': lambda: [GradientAccumulation(4*bs)]},
    'Clipping': lambda bs: {
        "fastai's GradientClip(0.1)": lambda: [training.GradientClip(0.1)],
        'GradientClip(0.1)': lambda: [GradientClip(0.1)],
        'GradientClip(auto=10)': lambda: [GradientClip(auto=10)],
        'GradientClip(max_value=0.01)': lambda: [GradientClip(max_value=0.01)],
        "timm's adaptive_clip_grad(0.01)": lambda: [AGC()],
        'GradientClip(adaptive=0.01)': lambda: [GradientClip(adaptive=0.01)]},
    'Others': lambda bs: {
        'plain fastai': list,
        'SAM()': lambda: [SAM()],
        'SAM(adaptive=True)': lambda: [SAM(adaptive=True)],
        'GradientCentralization()': lambda: [GradientCentralization()],
        'GradientNoise()': lambda: [GradientNoise()],
        'LookaheadWeights()': lambda: [LookaheadWeights()]}}

def tensors():
    "Bytes of all tensors that there are, each storage once"
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, Tensor) and o.layout is torch.strided]
    return sum({o.data_ptr(): o.nbytes() for o in map(Tensor.untyped_storage, found)}.values())

class Peak(Callback):
    "Most bytes in tensors at the events of a batch"
    order = 90
    def before_fit(self): self.peak = 0
    def look(self): self.peak = max(self.peak, tensors())
    before_backward = after_backward = before_step = after_step = after_batch = look

def peak(*cbs):
    "Most bytes of tensors in a fit of an MLP of a million parameters, with one item in a batch"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(),
                          nn.Linear(1000, 10))
    learn = digits_learner([*cbs, p := Peak()], bs=1, n=10, model=model, opt_func=partial(SGD, mom=0.9))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return p.peak,sum(o.nbytes for o in model.parameters())

def memory(cases):
    "Copies of the model that each adds to the peak of a plain fit"
    base,size = peak()
    copies = {k: (peak(*cbs())[0]-base)/size for k,cbs in cases.items()}
    return {k: round(max(v, 0), 2) for k,v in copies.items()}

def main():
    args = options(__doc__).parse_args()
    titles = list(NETS)[:2]
    nets,sizes = {title: net(title, 'cpu') for title in titles},dict(zip(titles, (8, 64)))
    case = lambda title,cbs: partial(seconds, partial(fastai, cbs=cbs, bar=False), nets[title])
    def table(title, cases):
        return measure({k: case(title, cbs) for k,cbs in cases.items()}, args.rounds, 'µs a batch')
    tables = {f'{kind}. {title}': table(title, cases(sizes[title]))
              for title in titles for kind,cases in CASES.items()}
    copies = memory({k: cbs for cases in CASES.values() for k,cbs in cases(1).items() if 'timm' not in k})
    results = report('gradients', tables, args.rounds, packages=('timm',), copies=copies)
    print('\nTargets: accumulation <= 1 x fastai\'s; SAM <= 1.1 x two plain steps')
    for title in titles:
        def over(kind, *rows): return ratio(results, f'{kind}. {title}', *rows)
        timms = over('Clipping', 'GradientClip(adaptive=0.01)', "timm's adaptive_clip_grad(0.01)")
        print(f"{over('Accumulation', 'GradientAccumulation(4 batches)'):.2f} accumulation, "
              f"{over('Clipping', 'GradientClip(0.1)'):.2f} clipping, {timms:.2f} adaptive over timm's, "
              f"{over('Others', 'SAM()')/2:.2f} SAM ({title.split(':')[0]})")
    print('\nCopies of the model in memory:', copies)

if __name__=='__main__': main()
