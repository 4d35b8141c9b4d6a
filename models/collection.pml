/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Collection in a repository: two catalogue shards, two writers, two collectors, users who delete
 * names and take leases. docs/repository-collection.md is the protocol in words; the step names
 * here are its.
 *
 * One step is one operation on one object of the store (a guarded update, a read, a scan of one
 * kind of key), since there is nothing larger that is atomic. A process that crashes is one that
 * takes no further step; one that is slow takes its next step arbitrarily late: both are among the
 * interleavings, so the model needs neither clocks nor crashes of its own. Fencing may happen to
 * any writer at any time.
 *
 *   packs     P0 is old data; P1 is written by writer 1, P2 by writer 2. (Recipe trees are
 *             collected in the same way: "pack" stands for both.)
 *   shard 0   name B, which writer 1 commits
 *   shard 1   name A, which is there from the start and holds P0; name C, which writer 2 commits;
 *             leases
 *   writer 1  registers in shard 0, then pins A in shard 1 as its parent; shares what A holds, and
 *             what it finds
 *   writer 2  registers in shard 1; shares what it finds
 *
 * With -DREPACK, P0 holds two records, of which A names one: a collector may repack it, that is,
 * register, store what is alive again in a pack of its own (T1 or T2), commit a forwarding of those
 * records, and then claim and remove the pack. Such a pack is collected as any other, once no root
 * needs the forwarding. (Writer 2 alone then, to keep the number of states small.)
 *
 * With -DSETTLE besides, all begins with what a repacking that came to nothing leaves: P0 is there,
 * and a forwarding of A's record in it to T0; or T0 is gone, however that came about. The settler
 * gives C the place where the forwarding leads. (One collector, one list and one lease then, after
 * which everything goes that nothing names.)
 *
 * Properties:
 *   P1  What a name or a lease holds exists: checked at every commit, lease, and removal of a pack.
 *   P2  Nobody waits for ever: writers and users have a step at any time, a collector waits only
 *       for what it could fence, and all come to their end.
 *
 * -DMISTAKE_... seeds a mistake, which must be caught.
 */
#ifndef LISTS
#define LISTS 2
#endif
#define NONE 255

/* Packs, and the records in them: a name or a lease holds records. */
#define P0 1
#define P1 2
#define P2 4
#ifdef REPACK
#define UNUSED 8                   /* the record of P0 that A does not name */
#define IN_P0 (P0 | UNUSED)
#define T1 16                      /* packs of the two collectors */
#define T2 32
#define T0 64                      /* with SETTLE: of one before */
#define T (T0 | T1 | T2)
byte register_t[2];                /* the collectors' registrations, in shard 0 */
/* Records of P0 that its forwarding names; in which pack. */
#ifdef SETTLE
byte forwarded = P0, forwarded_to = T0;
byte register_s;                   /* the settler's registration, in shard 1 */
#else
byte forwarded, forwarded_to;
#endif
#define FOUND(packs_) ((forwarded_to & (packs_)) -> forwarded : 0)
#define TARGET(records) ((records & forwarded) -> forwarded_to : 0)
#else
#define IN_P0 P0
#define T 0
#define FOUND(packs_) 0
#define TARGET(records) 0
#endif
#define RECORDS(packs_) (((packs_) & (P0 | P1 | P2 | T)) | (((packs_) & P0) -> IN_P0 : 0))
#define HOLDING(records) ((records & ~IN_P0) | ((records & IN_P0) -> P0 : 0) | TARGET(records))

/* The store. */
#ifdef SETTLE
byte packs = P0 | T0;          /* objects that exist */
#else
byte packs = P0;               /* objects that exist */
#endif
byte epoch[2];                 /* of each shard */
byte name_a = P0, name_b, name_c; /* what they hold; 0: no such name */
byte lease[2];                 /* in shard 1, by ascending number */
/* Registrations: 0 none, else 1 + the epoch acknowledged. */
byte register_1, register_2;
byte pin_1;                    /* what writer 1 pins as its parent in shard 1; 0: nothing */
/* The condemned lists. An entry is condemned, being deleted, or gone. */
byte condemned[LISTS], deleting[LISTS], target[LISTS];
byte open = NONE;              /* the list that is open */
byte next_list, done_epoch;    /* in the same map as `open` */

#define HELD (name_a | name_b | name_c | lease[0] | lease[1])
#define MISSING (HELD & ~RECORDS(packs) & ~FOUND(packs))

/* ---- Writers ---- */

/* Values that are not needed any more are forgotten, here and below: fewer states differ. */
#define FORGET known = 0; known_list = 0; seen = 0

/*
 * Register in a shard: read its epoch, then the open list, then one update guarded by the epoch.
 * Sharing is decided only after that.
 */
inline look(shard)
{
    seen = epoch[shard]
}

inline look_list()
{
    atomic {
        known_list = open;
        if
        :: open != NONE -> known = condemned[open] | deleting[open]
        :: else -> known = 0
        fi
    }
}

/* One pack is condemned and wanted: off the list with it, or its pages are stored again. */
inline rescue(pack, records)
{
    atomic {
        if
        :: (known & pack) && (mask & records) ->
           if
#ifdef MISTAKE_RESCUE_UNGUARDED
           :: true -> condemned[known_list] = condemned[known_list] & ~pack
#else
           :: (condemned[known_list] & pack) ->
              condemned[known_list] = condemned[known_list] & ~pack;
           :: !(condemned[known_list] & pack) -> mask = mask & ~(records)
#endif
           fi
        :: else
        fi
    }
}

inline rescue_all()
{
    rescue(P0, IN_P0);
    rescue(P1, P1);
    rescue(P2, P2)
}

/* What footers that were read since the registration name may be shared, if it is not condemned. */
inline share(others)
{
    if
    :: mask = mask | ((others) & RECORDS(packs & ~known))
    :: mask = mask | ((others) & RECORDS(packs)); rescue_all() /* or rescued first */
#ifdef REPACK
    :: mask = mask | (UNUSED & RECORDS(packs & ~known))
#endif
    :: skip
    fi
}

#ifdef MISTAKE_OLD_FOOTERS
#define OLD_FOOTERS old = packs
#define SHARE(others) mask = mask | ((others) & old & ~known)
#else
#define OLD_FOOTERS skip
#define SHARE(others) share(others)
#endif

#ifdef MISTAKE_REGISTRATION_NOT_GUARDED
#define EPOCH_SAME(shard) true
#define EPOCH_REGISTERED(shard) epoch[shard]
#else
#define EPOCH_SAME(shard) (epoch[shard] == seen)
#define EPOCH_REGISTERED(shard) seen
#endif
#ifdef MISTAKE_COMMIT_NOT_GUARDED
#define COMMIT_EPOCH(shard, registration) true
#else
#define COMMIT_EPOCH(shard, registration) (registration == epoch[shard] + 1)
#endif
#ifdef MISTAKE_FENCE_DOES_NOT_HOLD
#define REGISTERED(registration) true
#undef COMMIT_EPOCH
#define COMMIT_EPOCH(shard, registration) (acknowledged == epoch[shard] + 1)
#else
#define REGISTERED(registration) (registration != 0)
#endif

proctype writer_1()
{
    byte mask, known, known_list, seen, acknowledged, parent;
#ifdef MISTAKE_OLD_FOOTERS
    byte old;
    OLD_FOOTERS;
#endif
#ifdef MISTAKE_PARENT_FIRST
    if
    :: atomic { name_a != 0 -> pin_1 = name_a; parent = name_a }
    :: atomic { name_a == 0 -> goto out }
    fi;
#endif
own:
    look(0);
    look_list();
    if
    :: atomic { EPOCH_SAME(0) -> register_1 = EPOCH_REGISTERED(0) + 1; acknowledged = register_1 }
    :: atomic { !EPOCH_SAME(0) -> goto own }
    fi;
#ifndef MISTAKE_PARENT_FIRST
    /* Then the parent, whose existence is compared in the same update. */
    if
    :: atomic { name_a != 0 -> pin_1 = name_a; parent = name_a }
    :: atomic { name_a == 0 -> goto ended }
    fi;
#endif
    /* The parent's subtrees are walked: what is condemned of them is rescued, or stored again. */
    if
    :: atomic { mask = parent; parent = 0 }; rescue_all()
    :: parent = 0
    fi;
    SHARE(IN_P0 | P2);
    atomic { parent = 0; FORGET; packs = packs | P1; mask = mask | P1 };
commit:
    if
    :: atomic { COMMIT_EPOCH(0, register_1) && REGISTERED(register_1) ->
        name_b = mask; register_1 = 0; mask = 0; acknowledged = 0;
        assert(MISSING == 0) /* P1 */ }
    :: atomic { !REGISTERED(register_1) -> mask = 0; acknowledged = 0; goto ended } /* fenced */
    :: atomic { REGISTERED(register_1) && !COMMIT_EPOCH(0, register_1) -> skip };
       look(0);
       look_list();
       rescue_all();
       if
       :: atomic { epoch[0] == seen && REGISTERED(register_1) ->
            register_1 = seen + 1; acknowledged = register_1; FORGET }
       :: atomic { epoch[0] != seen || !REGISTERED(register_1) -> FORGET }
       fi;
       goto commit
    :: atomic { mask = 0; acknowledged = 0; goto ended } /* gives up */
    fi;
ended:
    if
    :: register_1 = 0; pin_1 = 0
    :: skip /* crashed: both stay until they are fenced */
    fi;
out:
    skip
}

proctype writer_2()
{
    byte mask, known, known_list, seen, acknowledged;
#ifdef MISTAKE_OLD_FOOTERS
    byte old;
    OLD_FOOTERS;
#endif
own:
    look(1);
    look_list();
    if
    :: atomic { EPOCH_SAME(1) -> register_2 = EPOCH_REGISTERED(1) + 1; acknowledged = register_2 }
    :: atomic { !EPOCH_SAME(1) -> goto own }
    fi;
    SHARE(IN_P0 | P1);
    atomic { FORGET; packs = packs | P2; mask = mask | P2 };
commit:
    if
    :: atomic { COMMIT_EPOCH(1, register_2) && REGISTERED(register_2) ->
        name_c = mask; register_2 = 0; mask = 0; acknowledged = 0;
        assert(MISSING == 0) /* P1 */ }
    :: atomic { !REGISTERED(register_2) -> mask = 0; acknowledged = 0; goto out }
    :: atomic { REGISTERED(register_2) && !COMMIT_EPOCH(1, register_2) -> skip };
       look(1);
       look_list();
       rescue_all();
       if
       :: atomic { epoch[1] == seen && REGISTERED(register_2) ->
            register_2 = seen + 1; acknowledged = register_2; FORGET }
       :: atomic { epoch[1] != seen || !REGISTERED(register_2) -> FORGET }
       fi;
       goto commit
    :: atomic { register_2 = 0; mask = 0; acknowledged = 0 } /* gives up */
    fi;
out:
    skip
}

#ifdef SETTLE
/* ---- The settler ---- */

#ifdef MISTAKE_SETTLE_UNCHECKED
#define RELIABLE(target_) true
#else
#define RELIABLE(target_) ((packs & (target_)) && !(known & (target_)))
#endif

/* Of one image: `before` is what its name holds, and the swap compares. */
inline settle(name)
{
    atomic { name & forwarded -> before = name };
own:
    look(1);
    look_list();
    if
    :: atomic { epoch[1] == seen && name == before -> register_s = seen + 1 }
    :: atomic { epoch[1] != seen && name == before -> goto own }
    :: atomic { name != before -> goto out }
    fi;
    atomic { after = forwarded_to };
    if
    :: atomic { after != 0 && (before & forwarded) && RELIABLE(after) -> FORGET }
    :: atomic { !(after != 0 && (before & forwarded) && RELIABLE(after)) -> goto give_up }
    fi;
commit:
    if
    :: atomic { register_s == epoch[1] + 1 && name == before ->
        name = (before & ~forwarded) | after; register_s = 0;
        assert(MISSING == 0) /* P1 */ }; goto out
    :: atomic { register_s == 0 || name != before -> goto give_up }
    :: atomic { register_s != 0 && register_s != epoch[1] + 1 && name == before -> skip };
       look(1);
       look_list();
       /* What it shares is rescued, or it gives up. */
       if
       :: atomic { !(known & after) -> skip }
       :: atomic { (known & after) && (condemned[known_list] & after) ->
            condemned[known_list] = condemned[known_list] & ~after }
       :: atomic { (known & after) && !(condemned[known_list] & after) -> goto give_up }
       fi;
       if
       :: atomic { epoch[1] == seen && register_s != 0 -> register_s = seen + 1; FORGET }
       :: atomic { epoch[1] != seen || register_s == 0 -> FORGET }
       fi;
       goto commit
    fi;
give_up:
    atomic { register_s = 0 };
out:
    atomic { before = 0; after = 0; FORGET }
}

proctype settler()
{
    byte before, after, known, known_list, seen;
end:
    if
    :: settle(name_c)
    fi
}
#endif

/* ---- Users ---- */

proctype users()
{
end:
    do
    :: atomic { name_a != 0 -> name_a = 0 }
    :: atomic { name_b != 0 -> name_b = 0 }
    :: atomic { name_c != 0 -> name_c = 0 }
    /* A lease of a name, in the name's shard; or of a lease, with a greater number. */
    :: atomic { name_a != 0 && lease[0] == 0 -> lease[0] = name_a; assert(MISSING == 0) /* P1 */ }
    :: atomic { name_c != 0 && lease[0] == 0 -> lease[0] = name_c; assert(MISSING == 0) /* P1 */ }
#ifndef SETTLE
    :: atomic { lease[0] != 0 && lease[1] == 0 ->
        lease[1] = lease[0]; assert(MISSING == 0) /* P1 */ }
    :: atomic { lease[0] != 0 && lease[1] != 0 -> lease[0] = 0 }
#endif
    od
}

/* ---- Collectors ---- */

/* Scan what can be a root, one kind of key after the other: names, leases, pins. */
inline mark()
{
    marked = name_b;
    marked = marked | name_a;
    marked = marked | name_c;
#ifndef MISTAKE_LEASES_NOT_MARKED
    marked = marked | lease[0];
    marked = marked | lease[1];
#endif
    marked = marked | pin_1
}

#ifdef MISTAKE_LEASES_BEFORE_NAMES
#define MARK_AGAIN marked = lease[0]; marked = marked | lease[1]; marked = marked | name_b; \
    marked = marked | name_a; marked = marked | name_c; \
    marked = marked | pin_1
#else
#define MARK_AGAIN mark()
#endif

/* Wait for an acknowledgement, or fence: a removal guarded by the registration's value. */
inline await_or_fence(registration)
{
    if
    :: registration == 0 || registration >= target[list] + 1
    :: atomic { registration != 0 && registration < target[list] + 1 -> registration = 0 }
    fi
}

/* What is marked, as packs; one that is worth repacking does not count. */
#ifdef REPACK
#define USED (HOLDING(marked) & ~((marked & IN_P0) != IN_P0 -> P0 : 0))

#ifdef MISTAKE_FORWARDING_NOT_GUARDED
#define FORWARDING_GUARD true
#else
#define FORWARDING_GUARD (epoch[0] == seen)
#endif

/* Is all that is alive forwarded already, to a pack that stays? Then nothing is moved. */
#ifdef SETTLE
#ifdef MISTAKE_FORWARDED_UNCHECKED
#define IS_FORWARDED ((alive & ~forwarded) == 0)
#else
#define IS_FORWARDED ((alive & ~forwarded) == 0 && (packs & forwarded_to) && \
    !((condemned[list] | deleting[list]) & forwarded_to))
#endif
#else
#define IS_FORWARDED false
#endif

/*
 * Store what is alive, and commit its forwarding: registered, its target neither condemned nor gone,
 * guarded by the epoch. If that is not so, P0 comes off the list. Or the collector is late, or dead,
 * at any of these steps.
 */
#define COMMIT_FORWARDING \
    if \
    :: atomic { FORWARDING_GUARD && safe -> forwarded = alive; forwarded_to = mine; \
         assert(MISSING == 0) /* P1 */ } \
    :: atomic { !(FORWARDING_GUARD && safe) -> \
         condemned[list] = condemned[list] & ~P0 } \
    fi

inline repack()
{
    if
    :: (condemned[list] & P0) && alive != 0 && !IS_FORWARDED ->
       look(0);
       if
       :: atomic { epoch[0] == seen -> register_t[me] = seen + 1 };
          atomic { packs = packs | mine; seen = 0 };
#ifdef MISTAKE_REMOVE_BEFORE_FORWARDING
          delete(P0);
#endif
          look(0);
          look_list();
          atomic { safe = (packs & mine) && !(known & mine); known = 0; known_list = 0 };
#ifdef MISTAKE_FORWARDING_NOT_GUARDED
          safe = true;
#endif
          COMMIT_FORWARDING; /* P1 */
          atomic { seen = 0; safe = false }
       :: atomic { epoch[0] != seen -> condemned[list] = condemned[list] & ~P0; seen = 0 }
       fi
    :: else
    fi
}

#define FORWARD_GOES(p) \
    forwarded_to = ((p == P0 && alive == 0 && forwarded_to != 0) -> 0 : forwarded_to)
#else
#define USED marked
#define FORWARD_GOES(p) skip
#endif

/* One entry: claim it, remove the pack, erase it. Whoever comes second finds nothing to do. */
inline delete(p)
{
#ifdef MISTAKE_DELETE_UNGUARDED
    if
    :: (condemned[list] & p) -> deleting[list] = deleting[list] | p;
       condemned[list] = condemned[list] & ~p
    :: else
    fi;
#else
    atomic {
        if
        :: (condemned[list] & p) -> condemned[list] = condemned[list] & ~p;
           deleting[list] = deleting[list] | p
        :: else
        fi
    };
#endif
    if
    :: (deleting[list] & p) ->
       atomic { packs = packs & ~p; assert(MISSING == 0) /* P1 */ };
       FORWARD_GOES(p);
       deleting[list] = deleting[list] & ~p
    :: else
    fi
}

proctype collector(byte me)
{
    byte list, candidates, marked, started;
#ifdef REPACK
    byte alive, seen, known, known_list, mine;
    bool safe;
    mine = (me == 0 -> T1 : T2);
#endif
begin:
    if
#ifdef MISTAKE_TWO_LISTS
    :: true -> started = done_epoch
#else
    :: atomic { open != NONE -> list = open; goto adopt } /* crashed or slow: it is gone on with */
    :: atomic { open == NONE && next_list < LISTS -> started = done_epoch }
#endif
    :: atomic { open == NONE && next_list >= LISTS -> goto out }
    fi;
#ifdef REPACK
    candidates = packs | (forwarded_to -> P0 : 0);
    atomic {
        candidates = candidates & ~(register_t[0] != 0 -> T1 : 0);
        candidates = candidates & ~(register_t[1] != 0 -> T2 : 0)
    };
#else
    candidates = packs;
#endif
    /* Read after the packs were listed: whose pack was there and who is not here has ended. */
    candidates = candidates & ~(register_1 != 0 -> P1 : 0);
    candidates = candidates & ~(register_2 != 0 -> P2 : 0);
    atomic { mark(); candidates = candidates & ~USED; marked = 0 };
    if
    :: candidates == 0 -> candidates = 0; goto out
    :: else
    fi;
    if
#ifdef MISTAKE_TWO_LISTS
    :: atomic { next_list < LISTS ->
#else
    :: atomic { open == NONE && done_epoch == started && next_list < LISTS ->
#endif
        list = next_list; next_list++;
        condemned[list] = candidates;
        target[list] = done_epoch + 1;
#ifdef MISTAKE_TWO_LISTS
        target[list] = epoch[0] + 1;
#endif
        open = list;
        candidates = 0; started = 0 }
    :: atomic { open != NONE || done_epoch != started || next_list >= LISTS ->
        candidates = 0; started = 0; goto begin }
    fi;
adopt:
    /* The next epoch in every shard; not again where it was done. */
    atomic { epoch[0] = (epoch[0] < target[list] -> target[list] : epoch[0]) };
    atomic { epoch[1] = (epoch[1] < target[list] -> target[list] : epoch[1]) };
#ifndef MISTAKE_NO_SECOND_MARK
    MARK_AGAIN;
#ifdef REPACK
    /* A pack with records that nobody names may stay on the list, to be repacked. */
    atomic {
        condemned[list] = condemned[list] & ~USED;
        alive = marked & IN_P0;
        marked = 0
    };
#else
    atomic { condemned[list] = condemned[list] & ~USED; marked = 0 };
#endif
#endif
#ifndef MISTAKE_NO_WAIT
    await_or_fence(register_1);
    await_or_fence(register_2);
#ifdef REPACK
    await_or_fence(register_t[0]);
    await_or_fence(register_t[1]);
#endif
#ifdef SETTLE
    await_or_fence(register_s);
#endif
    /* A pin whose writer is not registered any more. */
    if
    :: atomic { register_1 == 0 && pin_1 != 0 -> pin_1 = 0 }
    :: skip
    fi;
#endif
#ifdef REPACK
    repack();
#endif
    delete(P0);
    delete(P1);
    delete(P2);
#ifdef REPACK
    delete(T1);
    delete(T2);
#endif
#ifdef SETTLE
    delete(T0);
#endif
    atomic {
        if
        :: open == list && condemned[list] == 0 && deleting[list] == 0 ->
           open = NONE;
           done_epoch = target[list]
        :: else
        fi;
        list = 0
#ifdef REPACK
        ; alive = 0; register_t[me] = 0
#endif
    };
out:
    skip
}

#ifdef REPACK
/*
 * Two more collections, one after the other, while all others stand still: whoever is registered is
 * fenced, and what nothing needs goes.
 */
proctype later()
{
    atomic {
        open == NONE ->
        register_2 = 0; register_t[0] = 0; register_t[1] = 0;
#ifdef SETTLE
        register_s = 0;
#endif
        epoch[0] = done_epoch + 2; epoch[1] = done_epoch + 2; done_epoch = done_epoch + 2;
        packs = packs & HOLDING(HELD);
        forwarded_to = ((HELD & IN_P0) != 0 -> forwarded_to : 0)
    }
}
#endif

init {
    atomic {
#ifdef REPACK
        run later();
#endif
#ifdef SETTLE
        if
        :: packs = packs & ~T0
        :: skip
        fi;
        run settler();
#endif
#ifndef REPACK
        run writer_1();
#endif
        run writer_2();
        run collector(0);
#ifndef SETTLE
        run collector(1);
#endif
        run users()
    }
}
