/* An old program: linked directly against the vendor's library, it gets us by LD_PRELOAD. */
#include "application.h"

int main(void)
{
    CK_FUNCTION_LIST *p11 = NULL;
    CK_INFO info;
    MUST(C_GetFunctionList(&p11));
    for (unsigned round = 0; round < 2; round++) {
        MUST(C_Initialize(NULL));
        MUST(C_GetInfo(&info));
        printf("%.9s\n", info.libraryDescription);
        if (p11->C_GetInfo != C_GetInfo) must("one and the same function", CKR_GENERAL_ERROR);
        sign_and_verify(p11, 10);
        MUST(C_Finalize(NULL));
    }
    return 0;
}
