// Sphinx's default scores; pages of the guide first, then those to learn from
const Scorer = {
    score: ([docname, title, anchor, descr, score, filename, kind]) =>
        score + (docname.startsWith("guide/") ? 40 : docname.startsWith("tutorials/") ? 10 : 0),
    objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
    title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
