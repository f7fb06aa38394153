"Cost of a training batch with each guard, and with what stops a fit, over the fit without, beside fastai's"
import warnings
from functools import partial
warnings.filterwarnings('ignore')

from fastai.callback.tracker import EarlyStoppingCallback, TerminateOnNaNCallback
from fastai_callbacks_ext.all import (EarlyStopping, FastLoop, SampleLimit, SkipNonFinite, SpikeGuard,
                                      StepLimit, StopFile, TerminateOnNaN, TimeLimit)
from harness import measure, on_device, options, ratio, report
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

STOPPING = {
    'plain fastai': list,
    "fastai's EarlyStoppingCallback": lambda: [EarlyStoppingCallback(monitor='train_loss', patience=9)],
    'EarlyStopping(restore_best=True)':
        lambda: [EarlyStopping(monitor='train_loss', patience=9, restore_best=True)],
    'StepLimit': lambda: [StepLimit(10**9)],
    'SampleLimit': lambda: [SampleLimit(10**9)],
    'TimeLimit(schedule=True)': lambda: [TimeLimit(minutes=10**6, schedule=True)],
    'StopFile': lambda: [StopFile('stop')]}

def main():
    args = options(__doc__, device=True).parse_args()
    titles = list(NETS)[:2]
    nets = {title:net(title, args.device) for title in titles}
    case = lambda title,cbs: partial(seconds, partial(fastai, cbs=cbs, bar=False), nets[title])
    def table(title, cases):
        return measure({k:case(title, cbs) for k,cbs in cases.items()}, args.rounds, 'µs a batch')
    tables = {title: table(title, CASES) for title in titles}
    tables |= {f'Stopping. {title}': table(title, STOPPING) for title in titles}
    results = report(on_device('safety', args.device), tables, args.rounds, args.device)
    print('\nTarget: no dearer than fastai\'s')
    for title in titles:
        for row in list(CASES)[2:7]:
            print(f'{ratio(results, title, row, FASTAIS):.2f}  {row} / {FASTAIS} ({title.split(":")[0]})')

if __name__=='__main__': main()
