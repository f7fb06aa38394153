"Cost of a training batch with what logs a run, over the fit without, beside fastai's loggers"
import os, tempfile, warnings
from functools import partial
warnings.filterwarnings('ignore')

from fastai.callback.progress import CSVLogger
from fastai_callbacks_ext.all import FastLoop, RunLog
from harness import measure, options, ratio, report
from loop import NETS, fastai, net, seconds

CASES = {
    'plain fastai': list,
    "fastai's CSVLogger": lambda: [CSVLogger()],
    'RunLog()': lambda: [RunLog()],
    'RunLog(every=1)': lambda: [RunLog(every=1)],
    'FastLoop()': lambda: [FastLoop()],
    'FastLoop(), RunLog()': lambda: [FastLoop(), RunLog()]}

def main():
    args = options(__doc__).parse_args()
    os.chdir(tempfile.mkdtemp())
    titles = list(NETS)[:2]
    nets = {title:net(title, 'cpu') for title in titles}
    case = lambda title,cbs: partial(seconds, partial(fastai, cbs=cbs, bar=False), nets[title])
    tables = {title: measure({k:case(title, cbs) for k,cbs in CASES.items()}, args.rounds, 'µs a batch')
              for title in titles}
    results = report('monitors', tables, args.rounds)
    print('\nTarget: at most 1.01, tiny network 1.10')
    for title in titles:
        value = ratio(results, title, 'FastLoop(), RunLog()', 'FastLoop()')
        print(f'{value:.3f}  FastLoop(), RunLog() / FastLoop() ({title.split(":")[0]})')

if __name__=='__main__': main()
