"Cost of a training batch with each guard, over the same fit without it, beside fastai's own"
import warnings
from functools import partial
warnings.filterwarnings('ignore')

from fastai.callback.all import TerminateOnNaNCallback
from fastai_callbacks_ext.all import FastLoop, SkipNonFinite, SpikeGuard, TerminateOnNaN
from harness import measure, options, ratio, report
from loop import NETS, fastai, net, seconds

FASTAIS = "fastai's TerminateOnNaNCallback"
CASES = {
    'plain fastai': list,
    FASTAIS: lambda: [TerminateOnNaNCallback()],
    'TerminateOnNaN()': lambda: [TerminateOnNaN()],
    'TerminateOnNaN(every=20)': lambda: [TerminateOnNaN(every=20)],
    'SkipNonFinite()': lambda: [SkipNonFinite()],
    'SpikeGuard()': lambda: [SpikeGuard()],
    "SpikeGuard(action='rollback')": lambda: [SpikeGuard(watch=('loss','grad_norm'), action='rollback')],
    'FastLoop()': lambda: [FastLoop()],
    f'FastLoop(), {FASTAIS}': lambda: [FastLoop(), TerminateOnNaNCallback()],
    'FastLoop(), TerminateOnNaN()': lambda: [FastLoop(), TerminateOnNaN()],
    'FastLoop(), SkipNonFinite()': lambda: [FastLoop(), SkipNonFinite()],
    'FastLoop(), SpikeGuard()': lambda: [FastLoop(), SpikeGuard()]}

def main():
    args = options(__doc__).parse_args()
    titles = list(NETS)[:2]
    nets = {title:net(title, 'cpu') for title in titles}
    tables = {title: measure({k:partial(seconds, partial(fastai, cbs=cbs, bar=False), nets[title]) for k,cbs in CASES.items()}, args.rounds, 'µs a batch') for title in titles}
    results = report('safety', tables, args.rounds)
    print('\nTarget: no dearer than fastai\'s')
    for title in titles:
        for row in list(CASES)[2:7]: print(f'{ratio(results, title, row, FASTAIS):.2f}  {row} / {FASTAIS} ({title.split(":")[0]})')

if __name__=='__main__': main()
