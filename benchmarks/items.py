"""Wrong labels that were planted: the share that `ItemStats` ranks first, beside the measures of the papers

For each share of wrong labels, precision at k, where k is their number: of `suspects`, of the mean margin
(AUM) and of the mean confidence (cartography). The last two are computed here by their definitions, from
the logits of each epoch of the same runs."""
import json, platform, time, warnings
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
warnings.filterwarnings('ignore')

import numpy as np
import torch
from fastai.vision.all import *
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from fastai_callbacks_ext.items import ItemStats
from fastai_callbacks_ext.test_utils import digits_model
from harness import facts, options, seeds_table

FILE = Path(__file__).parent/'results/items.json'
OURS,AUM,CONFIDENCE = 'suspects()','mean margin (AUM)','mean confidence (cartography)'

def digits():
    x,y = load_digits(return_X_y=True)
    return torch.tensor(x/16).float().view(-1,1,8,8),torch.tensor(y)

def table_of(load):
    x,y = load(return_X_y=True)
    return torch.tensor((x-x.mean(0))/x.std(0)).float(),torch.tensor(y)

def passages(n_topics=20, words=20):
    "Passages of the longest topics of Python's language reference, as numbers of words, with their topics"
    texts = [topics[k].lower().split() for k in sorted(topics, key=lambda k: -len(topics[k]))[:n_topics]]
    number = {w: i for i,w in enumerate(sorted({*sum(texts, [])}))}
    rows = [([number[w] for w in text[i:i+words]], c) for c,text in enumerate(texts)
            for i in range(0, len(text)-words, words)]
    return tuple(map(torch.tensor, zip(*rows)))

def mlp(x, n_classes):
    n = 64
    return nn.Sequential(nn.Linear(x.shape[1], n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(),
                         nn.Linear(n, n_classes))

def bag(x, n_classes): return nn.Sequential(nn.EmbeddingBag(x.max().item()+1, 64), nn.Linear(64, n_classes))

TASKS = {     # data, model, epochs, batch size, largest learning rate
    'Digits, 8 epochs': (digits, lambda x,c: digits_model(), 8, 64, 1e-2),
    'Digits, 20 epochs': (digits, lambda x,c: digits_model(), 20, 64, 1e-2),
    'Wine (table), 30 epochs': (partial(table_of, load_wine), mlp, 30, 16, 1e-2),
    'Breast cancer (table), 30 epochs': (partial(table_of, load_breast_cancer), mlp, 30, 32, 1e-2),
    'Passages of 20 topics (text), 3 epochs': (passages, bag, 3, 32, 2e-2),
    'Passages of 20 topics (text), 10 epochs': (passages, bag, 10, 32, 2e-2)}

class Logits(Callback):
    "Keeps all logits, by epoch and item"
    run_valid = False
    def __init__(self, dl, n_epoch, n_classes):
        self.dl,self.kept = dl,torch.zeros(n_epoch, dl.n, n_classes)
    def after_backward(self):
        idxs = self.dl._DataLoader__idxs[self.iter*self.dl.bs:][:self.dl.bs]
        self.kept[self.epoch,idxs] = self.pred.detach()

def precisions(task, share, seed):
    "Precision at k of each ranking"
    data,model,n_epoch,bs,lr = TASKS[task]
    x,y = data()
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(x))
    x,y = x[order],y[order].clone()
    n_classes,wrong = int(y.max())+1,rng.permutation(len(x))[:round(share*len(x))]
    y[wrong] = (y[wrong]+torch.tensor(rng.randint(1, n_classes, len(wrong))))%n_classes
    set_seed(seed)
    dl = DataLoader(list(zip(x, y)), bs, shuffle=True)
    stats,logits = ItemStats(),Logits(dl, n_epoch, n_classes)
    learn = Learner(DataLoaders(dl, dl), model(x, n_classes), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, lr, cbs=[stats, logits])
    label = y.expand(n_epoch, -1)[...,None]
    own,other = logits.kept.gather(-1, label)[...,0],logits.kept.scatter(-1, label, -torch.inf).amax(-1)
    confidence = logits.kept.softmax(-1).gather(-1, label)[...,0].mean(0)
    ranked = {OURS: stats.suspects().index, AUM: (own-other).mean(0).argsort().numpy(),
              CONFIDENCE: confidence.argsort().numpy()}
    return {k: len({*o[:len(wrong)]} & {*wrong})/len(wrong) for k,o in ranked.items()}

def main():
    parser = options(__doc__)
    parser.add_argument('--seeds', type=int, default=5, help='(default: %(default)s)')
    args = parser.parse_args()
    tables = {}
    for task in TASKS:
        for share in (.05, .1, .2):
            found = [precisions(task, share, seed) for seed in range(args.seeds)]
            rows = {k: [round(o[k], 4) for o in found] for k in (AUM, CONFIDENCE, OURS)}
            title = f'{task}, {share:.0%} of the labels wrong'
            tables[title] = dict(unit='precision', larger_is_better=True, rows=rows)
            print(f'\n{title}\n\n{seeds_table(tables[title], list(rows))}', flush=True)
    versions = {'Python': platform.python_version()} | {p: version(p) for p in ('torch','fastai')}
    results = dict(date=time.strftime('%Y-%m-%d'), versions=versions, machine=f'{platform.machine()} CPU',
                   threads=1, tables=tables)
    FILE.write_text(json.dumps(results, indent=1)+'\n')
    print(facts(results))

if __name__=='__main__': main()
