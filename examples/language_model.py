"""Train an AWD-LSTM from scratch with and without AR and TAR, compare it with a trigram model, then poison a batch

The text is the language reference that Python's standard library carries, or any UTF-8 text. Needs no GPU and no download.
"""
import argparse, sys, textwrap, time, warnings
warnings.filterwarnings('ignore', '.torch.jit.script. is deprecated')   # from `import fastai`
from pydoc_data.topics import topics

from fastai.text.all import *
from fastai.callback.tracker import TerminateOnNaNCallback as FastaiTerminateOnNaN
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import PoisonBatch

SIZES = dict(tiny=dict(emb_sz=32, n_layers=1), small=dict(emb_sz=300, n_layers=1), medium=dict(emb_sz=400, n_layers=2))
PROMPTS = 'The "with" statement', 'If the object has a method', 'An exception is raised'
BS,SEQ_LEN,LR,ALPHA,BETA = 8,48,1e-2,2.,1.

# The text

def documents(path):
    "The topics of the language reference, or pieces of 500 words of the file `path` or of the files in the folder `path`"
    if path is None: return [topics[k] for k in sorted(topics)]
    files = sorted(get_files(path)) if path.is_dir() else [path]
    return [' '.join(words) for f in files for words in chunked(read_text(f).split(), 500)]

def read_text(file):
    "The text in `file`; `ValueError` if it is not text"
    try: text = file.read_text('utf-8')
    except UnicodeDecodeError: text = '\0'
    if '\0' in text: raise ValueError(f'{file} is not UTF-8 text')
    return text

def without_copies(docs, n=8):
    "`docs` less those that have more than half of their sequences of `n` words in common with longer ones"
    kept,seen = [],set()
    for doc in sorted(docs, key=len, reverse=True):
        words = doc.split()
        grams = {tuple(words[i:i+n]) for i in range(max(len(words)-n+1, 1))}
        if len(grams & seen) <= len(grams)/2: kept.append(doc)
        seen |= grams
    return kept

def split(docs, share=0.1):
    "Training and validation documents: whole ones, drawn at random, which make up at most `share` of the words"
    train,valid,room = [],[],share*sum(map(len, docs))
    for doc in random.sample(docs, len(docs)):
        if len(doc)>room: train.append(doc)
        else: valid.append(doc); room -= len(doc)
    return train,valid

class WordsAndMarks:
    "Tokenizer that takes punctuation marks apart"
    def __call__(self, texts): return (re.findall(r'\w+|[^\w\s]', t) for t in texts)

class Corpus:
    "The text as numbers: `train` by document, `valid` in one piece, cut so that it fills whole batches"
    def __init__(self, path):
        docs = documents(path)
        kept = without_copies(docs)
        self.tokenize,self.numericalize = Tokenizer(WordsAndMarks()),Numericalize(min_freq=2)
        train,valid = split([self.tokenize(o) for o in kept])
        self.numericalize.setup(L(train))
        self.vocab = self.numericalize.vocab
        self.train,self.valid = [self.numericalize(o) for o in train],self.numericalize([w for o in valid for w in o])
        self.sizes = len(train),len(valid),len(docs)-len(kept),sum(map(len, train))
        n_batches = (len(self.valid)-1) // (BS*SEQ_LEN)
        if n_batches<1: raise ValueError(f'{path} is too small: {sum(len(o.split()) for o in kept):,} words; 10,000 are enough')
        self.valid = self.valid[:n_batches*BS*SEQ_LEN + 1]

    def __str__(self):
        n_train,n_valid,n_copies,n_words = self.sizes
        unknown = lambda ids: (ids==0).float().mean().item()   # 0 is `xxunk`
        return (f'{n_train} documents to train on, {n_valid} to validate on; {n_copies} near-duplicates left out\n'
                f'{n_words:,} words to train on, {unknown(torch.cat(self.train)):.1%} of them unknown; '
                f'{len(self.valid)-1:,} to predict, {unknown(self.valid):.1%} unknown; {len(self.vocab):,} in the vocabulary')

# The baseline

class KneserNey:
    "Interpolated modified Kneser-Ney: an n-gram model as in Chen & Goodman (1999), 'An empirical study of smoothing techniques'"
    def __init__(self, ids, vocab_sz, n=3):
        self.vocab_sz,self.n = vocab_sz,n
        counts = [np.unique(self.grams(ids, k), return_counts=True) for k in range(1, n+1)]
        # below the highest order, what counts is after how many different words a sequence occurs
        lower = [np.unique(longer % vocab_sz**k, return_counts=True) for k,(longer,_) in enumerate(counts[1:], 1)]
        self.orders = [self.discount(*o) for o in [*lower, counts[-1]]]

    def grams(self, ids, n):
        "Each sequence of `n` words as one number"
        return sum(ids[i : len(ids)-n+1+i] * self.vocab_sz**(n-1-i) for i in range(n))

    def discount(self, grams, counts):
        "Tables of the discounted probability of each sequence and of the share each context leaves to the lower order"
        n1,n2,n3,n4 = [max((counts==i).sum(), 1) for i in (1,2,3,4)]
        y = n1/(n1+2*n2)
        off = np.array([1-2*y*n2/n1, 2-3*y*n3/n2, 3-4*y*n4/n3]).clip(0)[counts.clip(max=3)-1]
        contexts,i = np.unique(grams//self.vocab_sz, return_inverse=True)
        total = np.bincount(i, counts)
        return (grams, (counts-off)/total[i]), (contexts, np.bincount(i, off)/total)

    def prob(self, grams, n):
        "Probability of the last word of each sequence"
        if n==0: return 1/self.vocab_sz
        probs,rest = self.orders[n-1]
        return lookup(*probs, grams, 0) + lookup(*rest, grams//self.vocab_sz, 1) * self.prob(grams % self.vocab_sz**(n-1), n-1)

    def perplexity(self, ids):
        "Perplexity of all of `ids` but the first"
        return np.exp(-np.log(self.prob(self.grams(np.r_[ids[:self.n-2], ids], self.n), self.n)).mean())

def lookup(keys, values, query, default):
    "The `values` for `query`, given sorted `keys`"
    i = np.searchsorted(keys, query).clip(max=len(keys)-1)
    return np.where(keys[i]==query, values[i], default)

# The training

class EpochTable(Callback):
    "Prints a line an epoch, in a terminal also how far it is"
    order = Recorder.order+1
    def before_fit(self):
        self.learn.logger = self.row
        self.row(self.recorder.metric_names)
    def row(self, log): print(''.join(f'{f"{o:.3f}" if isinstance(o, float) else o:>12}' for o in log), flush=True)
    def after_batch(self):
        if self.training and sys.stdout.isatty(): print(f'{self.pct_train:8.0%} done', end='\r', flush=True)

class ActivationNorms(Callback):
    "Keeps the mean squares of the last layer's activations, and of what changes in them from one time step to the next"
    run_valid = False
    def before_fit(self): self.squares,self.changes = [],[]
    def after_loss(self):
        h = self.rnn.raw_out.detach()
        self.squares.append(h.pow(2).mean().item())
        self.changes.append(h.diff(dim=1).pow(2).mean().item())

def language_learner(corpus, size, seed, cbs):
    "A learner that has learned nothing yet"
    set_seed(seed)
    dl = partial(LMDataLoader, bs=BS, seq_len=SEQ_LEN)
    model = get_language_model(AWD_LSTM, len(corpus.vocab), awd_lstm_lm_config | SIZES[size])
    learn = Learner(DataLoaders(dl(corpus.train, shuffle=True), dl([corpus.valid])), model, loss_func=CrossEntropyLossFlat(),
                    metrics=Perplexity(), wd=0.1, moms=(0.8,0.7,0.8), cbs=cbs)
    learn.remove_cb(ProgressCallback)
    return learn

def train(corpus, size, epochs, seed, alpha, beta):
    "A learner that has learned `corpus`, and the norms it had on the way"
    learn = language_learner(corpus, size, seed, rnn_cbs(alpha, beta))
    norms = ActivationNorms()
    print(f'\nAWD-LSTM with alpha={alpha:g}, beta={beta:g}')
    learn.fit_one_cycle(epochs, LR, cbs=[norms, EpochTable()])
    return learn,norms

@torch.no_grad()
def generate(learn, corpus, prompt, n=40, temperature=0.7):
    "`prompt` and `n` words that the model draws to follow it"
    model = learn.model.eval()
    model.reset()
    ids = x = corpus.numericalize(corpus.tokenize(prompt))
    for _ in range(n):
        logits = model(x[None])[0][0,-1] / temperature
        logits[:3] = -np.inf   # no xxunk, xxpad, xxbos
        x = logits.softmax(-1).multinomial(1)
        ids = torch.cat([ids, x])
    text = re.sub(r'" ([^"]*) "', r'"\1"', ' '.join(decode_spec_tokens(corpus.vocab[i] for i in ids[1:])))
    return re.sub(r' (?=[.,:;)\]])|(?<=[(\[]) |(?<=\w \.) (?=[a-z\d_])', '', text)

def plot(runs, trigram, file):
    "Losses and norms of the `runs` (name: learner, norms)"
    fig,axs = plt.subplots(1, 3, figsize=(15,4.5), layout='constrained')
    for c,(name,(learn,norms)) in zip(('C0','C1'), runs.items()):
        rec = learn.recorder
        axs[0].plot(rec.losses, c=c, lw=1, label=f'training (smoothed), {name}')
        axs[0].plot(rec.iters, L(rec.values).itemgot(1), 'o--', c=c, label=f'validation, {name}')
        for ax,values in zip(axs[1:], (norms.squares, norms.changes)): ax.plot(values, c=c, lw=1, label=name)
    axs[0].axhline(np.log(trigram), c='gray', ls=':', label='validation, trigram model')
    axs[0].set(title='What is learned:\ncross-entropy of the next word', ylabel='nats per word')
    axs[1].set(title='What AR holds down:\nactivations of the last layer', ylabel='mean square', ylim=0)
    axs[2].set(title='What TAR holds down:\ntheir change from one time step to the next', ylabel='mean square', ylim=0)
    for ax in axs: ax.set_xlabel('training batch'); ax.legend(); ax.grid(alpha=0.3)
    fig.savefig(file, dpi=120)

# The poisoned batch

def fit_poisoned(learn, stop):
    "Fit on, the first batch having a NaN for its loss: numbers not finite then in weights and optimizer, and the validation loss"
    learn.fit(1, LR/100, cbs=[PoisonBatch(batch=0), stop])
    weights = list(learn.model.parameters())
    state = [t for p in weights for t in learn.opt.state[p].values() if isinstance(t, Tensor)]
    return not_finite(weights),not_finite(state),learn.validate()[0]

def not_finite(tensors): return sum((~t.isfinite()).sum().item() for t in tensors)

# The command

def parse_args():
    "The parser and the arguments; for bad ones, one line on stderr and status 2"
    class Parser(argparse.ArgumentParser):
        def error(self, message): self.exit(2, f'{self.prog}: error: {message}\n')
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('corpus', nargs='?', type=Path, help='a text file or a folder of text files (default: the Python language reference)')
    p.add_argument('--size', choices=SIZES, default='small', help='of the model (default: %(default)s)')
    p.add_argument('--epochs', type=int, default=6, help='(default: %(default)s)')
    p.add_argument('--seed', type=int, default=42, help='(default: %(default)s)')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'out/language_model.png', help='the figure (default: %(default)s)')
    args = p.parse_args()
    if args.epochs<1 or not 0<=args.seed<2**32: p.error('expected an --epochs of at least 1 and a --seed from 0 to 2**32-1')
    return p,args

def main():
    start = time.time()
    parser,args = parse_args()
    torch.set_num_threads(1)   # the same numbers on any number of cores
    set_seed(args.seed)
    try:
        args.out = args.out.with_suffix(args.out.suffix or '.png')
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plt.figure().savefig(args.out)   # learn now, not in the end, if that does not work
        corpus = Corpus(args.corpus)
    except (OSError, ValueError) as e: parser.error(e)
    print(corpus)
    runs = {name: train(corpus, args.size, args.epochs, args.seed, alpha, beta)
            for name,alpha,beta in (('with AR and TAR', ALPHA, BETA), ('without', 0., 0.))}
    learn = runs['with AR and TAR'][0]
    trigram = KneserNey(torch.cat(corpus.train).numpy(), len(corpus.vocab)).perplexity(corpus.valid.numpy())
    plot(runs, trigram, args.out)   # before `validate`, which empties the recorder
    (loss,perplexity),(_,unregularized) = [o.validate() for o,_ in runs.values()]

    print('\nThe model with AR and TAR goes on from a few words')
    for prompt in PROMPTS: print(textwrap.fill(generate(learn, corpus, prompt), 120, initial_indent='- ', subsequent_indent='  '))

    print(f'\nThis model is fitted on, and the loss of the very first batch is NaN; validation loss before: {loss:.6f}')
    ours,fastais = [fit_poisoned(learn, stop) for stop in (TerminateOnNaN(), FastaiTerminateOnNaN())]   # ours first: it harms nothing
    print(f'{"guard":36}{"NaN weights":>12}{"NaN in optimizer":>18}{"validation loss":>18}')
    for name,(weights,state,after) in (("fastai's TerminateOnNaNCallback", fastais), ('TerminateOnNaN', ours)):
        print(f'{name:36}{weights:12,}{state:18,}{after:18.6f}')

    print(f'\n{f"Perplexity on the same {len(corpus.valid)-1:,} words":36}{"":12}{"/ trigram":>18}')
    for name,value in (('trigram, modified Kneser-Ney', trigram), ('AWD-LSTM', unregularized), ('AWD-LSTM with AR and TAR', perplexity)):
        print(f'{name:36}{value:12.2f}{value/trigram:18.3f}')
    print(f'\nFigure: {args.out}\nTime: {time.time()-start:.0f} s')

if __name__=='__main__': main()
